package services

import (
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/kernel-tests/debian"
)

// A Proxy is a squid.
type Proxy struct {
	*Process
	access string // file
}

// Squid starts Debian's squid, which lets everybody on this machine reach everything,
// plainly and by CONNECT, and keeps nothing.
func Squid(t testing.TB) *Proxy {
	t.Helper()
	program := need(t, debian.Squid)
	dir, addr := scratch(t), FreeAddr(t)
	if u, err := user.Lookup("proxy"); err == nil && os.Geteuid() == 0 { // who it becomes
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		if err := os.Chown(dir, uid, gid); err != nil {
			t.Fatal(err)
		}
	}
	access := filepath.Join(dir, "access.log")
	config := fmt.Sprintf(`http_port %s
http_access allow localhost
http_access deny all
cache deny all
cache_mem 0 MB
access_log stdio:%s
cache_log %s
pid_filename none
netdb_filename none
coredump_dir %s
pinger_enable off
shutdown_lifetime 0 seconds
max_filedescriptors 1024
visible_hostname localhost
buffered_logs off
`, addr, access, filepath.Join(dir, "cache.log"), dir)
	file := filepath.Join(dir, "squid.conf")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	return &Proxy{launch(t, addr, connects(addr), program, "-N", "-d", "1", "-f", file), access}
}

// Served is how many requests or tunnels it has logged that hold text: each when it ended.
func (p *Proxy) Served(t testing.TB, text string) int {
	t.Helper()
	log, err := os.ReadFile(p.access)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}
