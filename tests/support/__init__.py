"""What several test files share: QEMU's tools as oracles, and data that tells where it belongs."""
