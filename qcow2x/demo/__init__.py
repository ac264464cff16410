"""What ``qcow2x demo`` is made of: a real disk, its way through qcow2 and back, and a race."""
