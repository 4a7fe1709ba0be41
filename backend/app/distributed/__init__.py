"""多个进程（rank）一起训练同一个模型；主干不知道这里。读法：comm -> mesh -> apply。"""
