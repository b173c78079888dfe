"""Pictures: opened safely, decoded, cropped, turned into what a network takes."""
