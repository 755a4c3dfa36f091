"""Many runs over one base, as one program: each keeps what it would have alone."""
