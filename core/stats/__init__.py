"""The statistics file: sums over tokens, per layer and expert, that merge by addition."""
