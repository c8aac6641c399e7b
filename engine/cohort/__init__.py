"""Many pictures as one job: a table or a recipe in, pictures or bags with labels out."""
