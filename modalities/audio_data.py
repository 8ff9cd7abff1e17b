"""`open_source` by the name that it had before data had a room of its own, for scripts that import it."""

from modalities.data.audio import open_source as open_source
