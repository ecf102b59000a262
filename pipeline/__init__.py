"""Pipeline parallelism: lectures 07, 08 and 09, CODE 03."""
