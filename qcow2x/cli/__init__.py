"""The ``qcow2x`` command, one file per subcommand. Import nothing here: start-up time counts."""
