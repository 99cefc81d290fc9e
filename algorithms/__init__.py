"""What is computed: data types, loops, losses, rewards. Knows no cluster and no backend."""
