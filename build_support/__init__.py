"""What setup.py and the scripts share: never installed, shipped in the source distribution."""
