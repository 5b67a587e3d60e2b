"""Pure statistics with numpy and scipy, without torch: confidence bounds, radii, tests and metrics."""
