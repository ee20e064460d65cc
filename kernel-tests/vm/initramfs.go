package main

import (
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// A cpio writes an archive of the kind that the kernel unpacks into its first root
// file system: "newc", Documentation/driver-api/early-userspace/buffer-format.rst.
// Names are absolute and clean; the folders above an entry come by themselves.
type cpio struct {
	w     io.Writer
	inode int
	dirs  map[string]bool // written already
	err   error           // the first one; nothing is written after it
}

func newCpio(w io.Writer) *cpio { return &cpio{w: w, dirs: map[string]bool{"/": true}} }

func (c *cpio) dir(name string) {
	if !c.dirs[name] {
		c.add(name, unix.S_IFDIR|0o755, 0, nil)
		c.dirs[name] = true
	}
}

func (c *cpio) text(name, text string) {
	c.add(name, unix.S_IFREG|0o644, int64(len(text)), strings.NewReader(text))
}

func (c *cpio) symlink(name, target string) {
	c.add(name, unix.S_IFLNK|0o777, int64(len(target)), strings.NewReader(target))
}

// program copies an executable of the host.
func (c *cpio) program(name, from string) {
	f, err := os.Open(from)
	if err != nil {
		c.fail(err)
		return
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		c.fail(err)
		return
	}
	c.add(name, unix.S_IFREG|0o755, info.Size(), f)
}

func (c *cpio) add(name string, mode uint32, size int64, body io.Reader) {
	c.dir(path.Dir(name))
	c.entry(strings.TrimPrefix(name, "/"), mode, size, 0, 0)
	if body == nil || c.err != nil {
		return
	}
	n, err := io.Copy(c.w, body)
	if err == nil && n != size {
		err = fmt.Errorf("%s changed its size from %d to %d", name, size, n)
	}
	c.fail(err)
	c.write(padding(size))
}

// device makes a character device.
func (c *cpio) device(name string, major, minor uint32) {
	c.dir(path.Dir(name))
	c.entry(strings.TrimPrefix(name, "/"), unix.S_IFCHR|0o600, 0, major, minor)
}

// entry writes a header and the name.
func (c *cpio) entry(name string, mode uint32, size int64, major, minor uint32) {
	c.inode++
	head := fmt.Sprintf("070701%08X%08X%016X%08X%08X%08X%016X%08X%08X%08X%08X%s\x00",
		c.inode, mode, 0 /* owner, group */, 1 /* links */, 0 /* time */, size, 0, /* the file's own device */
		major, minor, len(name)+1, 0 /* no checksum */, name)
	c.write(head + padding(int64(len(head))))
}

// close ends the archive and returns what went wrong since it began.
func (c *cpio) close() error {
	c.entry("TRAILER!!!", 0, 0, 0, 0)
	return c.err
}

func (c *cpio) write(text string) {
	if c.err == nil {
		_, c.err = io.WriteString(c.w, text)
	}
}

func (c *cpio) fail(err error) {
	if c.err == nil {
		c.err = err
	}
}

// padding fills n bytes up to a multiple of four.
func padding(n int64) string { return "\x00\x00\x00"[:-n&3] }

// shell is busybox as Debian has it: its sh also finds its other commands.
const shell = "/bin/busybox"

// writeInitramfs makes the file name: this program as init, the job, the host's
// program that it runs, if any, and, where the host has one, a shell.
func writeInitramfs(name string, j *job, program string) (err error) {
	self, err := os.Executable()
	if err != nil {
		return err
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
	c := newCpio(f)
	c.device("/dev/console", 5, 1) // where init prints: the kernel's log
	c.fail(checkStatic(self))
	c.program(initPath, self)
	c.text(jobPath, string(text))
	c.text("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")
	c.text("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
	c.text("/etc/group", "root:x:0:\n")
	for _, dir := range []string{"/mnt", "/root", "/var/tmp", j.Dir} {
		c.dir(dir)
	}
	if program != "" {
		c.fail(checkStatic(program))
		c.program(j.Args[0], program)
	}
	if checkStatic(shell) == nil {
		c.program(shell, shell)
		c.symlink("/bin/sh", shell)
	}
	return c.close()
}

// checkStatic says why the executable name does not run where there are no libraries.
func checkStatic(name string) error {
	f, err := elf.Open(name)
	if err != nil {
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
