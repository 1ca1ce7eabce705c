"""`python -m llm2slm_export`."""

from llm2slm_export.cli.app import main

main()
