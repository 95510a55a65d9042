"""Predictions in closed form or by quadrature: NumPy float64 in and out, no training inside."""
