"""SGLang servers: separate processes in an environment of their own, reached by HTTP."""
