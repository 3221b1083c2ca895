import os
import tempfile

# Where transformers keeps copies of the code that it runs with trust_remote_code; read when it is imported.
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="hf_modules_"))
