"""What the command ``idlora`` is made of, callable from Python."""
