"""Files and directories, whoever's they are: whole-or-nothing writes, working directories, bounded JSON, rows of data files."""
