"""The readers of Megatron's .bin/.idx files and of the flags that name them."""
