"""musubi-tuner as a host: its loop, the prompts that are encoded before it, and the command that encodes them.

musubi-tuner encodes captions in a script of their own, and its trainer has neither text encoder nor captions. So SPF
encodes what it needs beside them in a command of its own (`caching`), which runs the text side of training and writes
down what that asked for; training plays it back (`prompts`).
"""
