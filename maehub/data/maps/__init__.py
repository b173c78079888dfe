"""Label maps: which class every pixel of a picture is of, from folders as users have them."""
