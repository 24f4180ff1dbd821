"""The command line. It holds no logic: it parses, calls a room, and prints."""
