"""Whisper on fastattn: what somebody says in a wav file, in writing, and which moment each word listened to."""
