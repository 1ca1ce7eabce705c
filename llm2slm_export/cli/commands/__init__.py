"""The commands, one file each: the function behind the command, and the functions that print its result."""
