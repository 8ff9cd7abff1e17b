"""Where samples come from: listing, images, shards, audio, series, vectors, the hub."""
