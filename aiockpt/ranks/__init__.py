"""How the ranks of a job agree on a commit: the port, and a world of one."""
