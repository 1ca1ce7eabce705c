"""Files and directories of any kind: atomic writes, working directories, bounded JSON, rows of data files."""
