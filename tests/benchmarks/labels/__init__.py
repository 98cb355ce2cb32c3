"""Does the joint z of unseen cells tell cell types better than one modality does, and do batches mix in it?"""
