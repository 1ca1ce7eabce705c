"""The three graphs as torch modules, each with its forward, example inputs and dynamic shapes."""
