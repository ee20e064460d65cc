package cachefiles

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/kernel"
	"github.com/erofsd/erofsd/internal/testenv"
)

// commands is a device that takes commands and fails some.
type commands struct {
	kernelCalls
	fail map[string]error
	got  []string
}

func (c *commands) Command(_ int, command string) error {
	c.got = append(c.got, command)
	word, _, _ := strings.Cut(command, " ")
	return c.fail[word]
}

func (c *commands) CommandIn(_ int, root, dir, command string) error {
	c.got = append(c.got, root+" "+dir+" "+command)
	word, _, _ := strings.Cut(command, " ")
	return c.fail[word]
}

func device(t *testing.T, c *commands) *Device {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	d, err := NewFakeDevice(os.NewFile(uintptr(fd), "device"), "", c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// diskDir is a directory that Bind takes: one that is not on tmpfs.
func diskDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := checkDir(dir); err != nil {
		testenv.Need(t, "disk", "needs a temporary directory on a disk: "+err.Error())
	}
	return dir
}

func TestBind(t *testing.T) {
	c := &commands{}
	d, dir := device(t, c), diskDir(t)
	if err := NewServer(d, nil, Options{}).Serve(t.Context()); err == nil {
		t.Error("a device is served that is not bound")
	}
	if err := d.Bind(BindOptions{Dir: dir}); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"bstop 0%", "bcull 1%", "brun 2%", "fstop 0%", "fcull 1%", "frun 2%", // each leaves stop < cull < run
		"dir " + dir, "tag erofsd", "bind ondemand",
	}
	if !slices.Equal(c.got, want) || d.Dir() != dir {
		t.Errorf("got  %q\nwant %q", c.got, want)
	}
	if err := d.Bind(BindOptions{Dir: dir}); err == nil || len(c.got) != len(want) {
		t.Errorf("bind again: %v", err)
	}
	c.got = nil
	if err := d.Cull(Key{"erofs,img1", "img1"}); err != nil {
		t.Error(err)
	}
	if err := d.CullVolume("erofs,img1"); err != nil {
		t.Error(err)
	}
	want = []string{dir + " cache/Ierofs,img1/@83 cull Dimg1", dir + " cache cull Ierofs,img1"}
	if !slices.Equal(c.got, want) {
		t.Errorf("got  %q\nwant %q", c.got, want)
	}
}

// Each failure of bind says what it is (reference 1.3).
func TestBindErrors(t *testing.T) {
	for name, c := range map[string]struct {
		word        string
		errno       error
		says        string
		unsupported bool
	}{
		"not on demand":    {"bind", unix.EINVAL, "CONFIG_CACHEFILES_ONDEMAND", true},
		"file system":      {"bind", unix.EOPNOTSUPP, "O_TMPFILE", true},
		"busy":             {"bind", unix.EBUSY, "end the daemon", false},
		"read-only":        {"bind", unix.EROFS, "read-only", false},
		"full":             {"bind", unix.ENOBUFS, "MiB", false},
		"limits":           {"bind", unix.ERANGE, "limits", false},
		"dead":             {"bind", unix.EIO, "dmesg", false},
		"vanished":         {"bind", unix.ENOENT, "no such file", false},
		"given before":     {"tag", unix.EEXIST, "open the device anew", false},
		"not a cachefiles": {"bstop", unix.EOPNOTSUPP, "not a cachefiles device", false},
	} {
		o := BindOptions{Dir: diskDir(t)}
		err := device(t, &commands{fail: map[string]error{c.word: c.errno}}).Bind(o)
		if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), o.Dir) || !errors.Is(err, c.errno) {
			t.Errorf("%s: %v", name, err)
		}
		if errors.Is(err, kernel.ErrNotSupported) != c.unsupported {
			t.Errorf("%s: unsupported %v: %v", name, !c.unsupported, err)
		}
	}
}

func TestBindChecksTheDirectory(t *testing.T) {
	dir := diskDir(t)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		o    BindOptions
		want error
	}{
		"empty":         {BindOptions{}, nil},
		"relative":      {BindOptions{Dir: "cache"}, nil},
		"missing":       {BindOptions{Dir: filepath.Join(dir, "missing")}, fs.ErrNotExist},
		"a file":        {BindOptions{Dir: file}, unix.ENOTDIR},
		"newline":       {BindOptions{Dir: dir + "\n"}, nil},
		"NUL":           {BindOptions{Dir: dir + "\x00"}, nil},
		"long":          {BindOptions{Dir: "/" + strings.Repeat("x", 4092)}, nil},
		"in memory":     {BindOptions{Dir: "/dev/shm"}, kernel.ErrNotSupported},
		"tag of words":  {BindOptions{Dir: dir, Tag: "a b"}, nil},
		"tag with line": {BindOptions{Dir: dir, Tag: "a\n"}, nil},
	} {
		k := &commands{}
		err := device(t, k).Bind(c.o)
		if err == nil || k.got != nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v; commands %q", name, err, c.want, k.got)
		}
	}
}

func TestOpenErrors(t *testing.T) {
	for errno, c := range map[unix.Errno]struct {
		says        string
		unsupported bool
	}{
		unix.ENOENT: {"", true}, unix.ENXIO: {"", true}, unix.ENODEV: {"", true},
		unix.EBUSY: {"nydusd", false}, unix.EPERM: {"CAP_SYS_ADMIN", false}, unix.EACCES: {"CAP_SYS_ADMIN", false}, unix.EMFILE: {"", false},
	} {
		err := openError("/dev/cachefiles", errno)
		if !errors.Is(err, errno) || errors.Is(err, kernel.ErrNotSupported) != c.unsupported || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%v: %v", errno, err)
		}
	}
	missing := filepath.Join(t.TempDir(), "cachefiles")
	if d, err := Open(missing); d != nil || !errors.Is(err, kernel.ErrNotSupported) {
		t.Errorf("open: %v", err)
	}
	if err := Supported(missing, t.TempDir()); !errors.Is(err, kernel.ErrNotSupported) {
		t.Errorf("Supported: %v", err)
	}
}

// The kernel's list of caches as 6.1 prints it.
func TestHasCache(t *testing.T) {
	list := []byte("CACHE    REF   VOLS  OBJS  ACCES S NAME\n" +
		"======== ===== ===== ===== ===== = ===============\n" +
		"00000001     2     1     3     1 A erofsd\n" +
		"00000002     1     0     0     0 - old\n")
	for tag, want := range map[string]bool{"erofsd": true, "old": false, "NAME": false, "": false, "erofs": false} {
		if got := hasCache(list, tag); got != want {
			t.Errorf("%q: %v", tag, got)
		}
	}
}

func TestEmptyGraveyard(t *testing.T) {
	dir := t.TempDir()
	outside := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(filepath.Join(dir, "graveyard", "6750a1b200000001", "@00"), 0o700))
	must(os.MkdirAll(filepath.Join(dir, "cache", "Ierofs,live"), 0o700))
	must(os.WriteFile(filepath.Join(dir, "graveyard", "6750a1b200000001", "@00", "Dblob"), nil, 0))
	must(os.WriteFile(filepath.Join(outside, "kept"), nil, 0o600))
	must(os.Symlink(outside, filepath.Join(dir, "graveyard", "link")))
	d := &Device{dir: dir}
	must(d.emptyGraveyard())
	left, err := os.ReadDir(filepath.Join(dir, "graveyard"))
	if err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	for _, kept := range []string{filepath.Join(outside, "kept"), filepath.Join(dir, "cache", "Ierofs,live")} {
		if _, err := os.Stat(kept); err != nil {
			t.Error(err)
		}
	}
	must(os.Remove(filepath.Join(dir, "graveyard")))
	must(d.emptyGraveyard())
}

// The kernel's way to act in a directory, on a file that takes any command: the
// working directory of this process stays, and no link is followed.
func TestCommandIn(t *testing.T) {
	testenv.Root(t) // unshare(2)
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "cache", "Ierofs,a", "@01"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("Ierofs,a", filepath.Join(root, "cache", "Ierofs,link")); err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(filepath.Join(root, "commands"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	before, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]error{
		"cache/Ierofs,a/@01": nil, "cache/Ierofs,a/@02": fs.ErrNotExist, "cache/Ierofs,b/@01": fs.ErrNotExist,
		"cache/Ierofs,link/@01": unix.ENOTDIR, "commands": unix.ENOTDIR,
	} {
		if err := (kernelCalls{}).CommandIn(int(out.Fd()), root, dir, "cull x;"); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", dir, err, want)
		}
	}
	if after, err := os.Getwd(); err != nil || after != before {
		t.Errorf("the working directory went from %s to %s, %v", before, after, err)
	}
	if got, err := os.ReadFile(out.Name()); err != nil || string(got) != "cull x;" {
		t.Errorf("commands written: %q, %v", got, err)
	}
}
