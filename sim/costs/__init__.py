"""What things cost: profiles of machines and the cost model made of one."""
