"""The machine under the library: files from strangers, caches, locks, memory, the screen."""
