"""What runs a bundle's three graphs: the interface the generation loop sees, and one module per runtime."""
