"""Does broken or hostile input ever crash, hang, fill the memory, run code, or get served wrong?"""
