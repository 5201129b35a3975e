"""What finished runs tell, alone and against each other."""
