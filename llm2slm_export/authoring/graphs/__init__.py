"""The three graphs as torch modules to export. Each carries its forward, example inputs and dynamic shapes."""
