"""Work from image to image, one operation a file. Import the one you need; nothing is imported here."""
