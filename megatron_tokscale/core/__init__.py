"""Code that every room uses: errors, files, tensors, arrays, checksums, messages, the bootstrap."""
