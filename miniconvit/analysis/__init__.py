"""What a ConViT attends to: maps, distances, gates, masks, and their pictures."""
