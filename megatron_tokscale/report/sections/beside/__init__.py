"""The section on a second run beside this one."""
