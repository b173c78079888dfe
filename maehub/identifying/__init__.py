"""What a stranger's checkpoint is: `maehub.identify` is in ``answering``, which reads like the journey.

checkpoints                 a file of weights, opened as little as possible
plain_vit  families         what its names and shapes are: a network of ours, or whose
judging                     what a decoder was trained to predict, by its predictions on two photos
identification  advice      the answer, and the line to type next
"""
