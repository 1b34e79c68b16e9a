"""Many masks on running servers: each evaluated, gated and timed, and what was found of all of them."""
