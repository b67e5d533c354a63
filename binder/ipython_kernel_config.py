# JupyterLab writes the version of Python that the kernel names into every notebook it opens, and where the notebook named another one it
# is changed, "unsaved", before anybody has typed. The notebooks of this course name this version (see tools/build.py), and so does
# the kernel of an environment in which this file is etc/ipython/ipython_kernel_config.py.
c.IPKernelApp.exec_lines = ["get_ipython().kernel.language_info['version'] = '3'"]  # noqa: F821 - c is there when it is read
