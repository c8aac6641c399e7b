"""The tile-level probe: pictures of classes → vectors → plain classifiers → figures."""
