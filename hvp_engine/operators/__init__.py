"""Curvature matrices as linear operators."""
