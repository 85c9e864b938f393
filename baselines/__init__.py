"""What the paper compares with: searches, hypernetworks, fitted responses, and the registry of its methods."""
