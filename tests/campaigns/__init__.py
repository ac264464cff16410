"""Long searches for lost data: each runs for as long as it is told to and says what it covered."""
