"""gunicorn, behind nginx."""
bind = "0.0.0.0:9999"
# "A starting value could be CPU * 2" (Flask, Deploying to Production); an instance may use one. Threads, since the
# workers without them close a connection after each answer.
workers = 2
worker_class = "gthread"
threads = 8
keepalive = 75
worker_tmp_dir = "/dev/shm"  # "How do I avoid Gunicorn excessively blocking in os.fchmod?" (its FAQ)
