package main

import (
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// A cpio writes an archive of the kind that the kernel unpacks into its first root
// file system: "newc", Documentation/driver-api/early-userspace/buffer-format.rst.
type cpio struct {
	w     io.Writer
	inode int
	dirs  map[string]bool
	err   error // the first one
}

// add writes an entry, after the folders above it. name is absolute.
func (c *cpio) add(name string, mode uint32, size int64, body io.Reader, major, minor uint32) {
	if name = path.Clean(name); c.err != nil || c.dirs[name] {
		return
	}
	if dir := path.Dir(name); dir != "/" {
		c.dir(dir)
	}
	if size > 1<<32-1 {
		c.err = errors.Join(c.err, fmt.Errorf("%s has %d bytes, more than an initramfs can hold of a file", name, size))
	}
	c.inode++
	c.entry(strings.TrimPrefix(name, "/"), mode, size, body, major, minor)
}

func (c *cpio) entry(name string, mode uint32, size int64, body io.Reader, major, minor uint32) {
	const mtime, links = 0, 1
	head := "070701"
	for _, v := range []uint32{
		uint32(c.inode), mode, 0, 0, links, mtime, uint32(size), 0, 0, major, minor, uint32(len(name) + 1), 0,
	} {
		head += fmt.Sprintf("%08X", v)
	}
	c.write(padded(head + name + "\x00"))
	if body == nil || c.err != nil {
		return
	}
	n, err := io.Copy(c.w, body)
	if err == nil && n != size {
		err = fmt.Errorf("%s changed its size from %d to %d", name, size, n)
	}
	c.err = err
	c.write(strings.Repeat("\x00", int(-size&3)))
}

// padded fills text up to a multiple of four bytes.
func padded(text string) string { return text + strings.Repeat("\x00", -len(text)&3) }

func (c *cpio) write(text string) {
	if c.err == nil {
		_, c.err = io.WriteString(c.w, text)
	}
}

func (c *cpio) dir(name string) {
	if !c.dirs[name] {
		c.add(name, unix.S_IFDIR|0o755, 0, nil, 0, 0)
		c.dirs[name] = true
	}
}

func (c *cpio) text(name, text string) {
	c.add(name, unix.S_IFREG|0o644, int64(len(text)), strings.NewReader(text), 0, 0)
}

func (c *cpio) symlink(name, target string) {
	c.add(name, unix.S_IFLNK|0o777, int64(len(target)), strings.NewReader(target), 0, 0)
}

// program copies an executable of the host.
func (c *cpio) program(name, from string) {
	f, err := os.Open(from)
	if err != nil {
		c.err = errors.Join(c.err, err)
		return
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		c.err = errors.Join(c.err, err)
		return
	}
	c.add(name, unix.S_IFREG|0o755, info.Size(), f, 0, 0)
}

func (c *cpio) close() error {
	c.inode = 0
	c.entry("TRAILER!!!", 0, 0, nil, 0, 0)
	return c.err
}

// writeInitramfs makes the file name: this program as init, the job, the program that
// it runs and, where the host has one, a shell.
func writeInitramfs(name string, j *job, program string) (err error) {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	for _, p := range []string{self, program} {
		if err := checkStatic(p); p != "" && err != nil {
			return err
		}
	}
	text, err := json.Marshal(j)
	if err != nil {
		return err
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	c := &cpio{w: f, dirs: make(map[string]bool)}
	c.add("/dev/console", unix.S_IFCHR|0o600, 0, nil, 5, 1) // init's own output, the kernel's log
	c.program(initPath, self)
	c.text(jobPath, string(text))
	c.text("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")
	c.text("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
	c.text("/etc/group", "root:x:0:\n")
	for _, dir := range []string{"/proc", "/sys", "/run", "/tmp", "/root", "/var/tmp", "/mnt", cacheDir, smallDir, j.Dir} {
		c.dir(filepath.Clean(dir))
	}
	for _, s := range j.Shares {
		c.dir(s.Path)
	}
	if program != "" {
		c.program(j.Args[0], program)
	}
	if shell := "/bin/busybox"; checkStatic(shell) == nil {
		c.program(shell, shell)
		c.symlink("/bin/sh", "busybox")
	}
	return c.close()
}

// checkStatic says whether the executable name runs where there are no libraries.
func checkStatic(name string) error {
	f, err := elf.Open(name)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return fmt.Errorf("%s is no program for the guest: %w", name, err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("%s is linked dynamically, and the guest has no libraries: build it with CGO_ENABLED=0", name)
		}
	}
	return nil
}
