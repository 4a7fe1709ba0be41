"""子命令，一个一个文件：参数、用法的例子、run。共用的在 cli/shared，入口在 cli/main.py。"""
