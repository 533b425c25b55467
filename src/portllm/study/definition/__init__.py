"""What a study's file asks for."""
