package registry

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"

	"github.com/erofsd/erofsd/backend"
)

// maxHostsFile bounds a hosts.toml.
const maxHostsFile = 1 << 20

// hostFile is a hosts.toml of containerd: a registry's own address and the mirrors before
// it. Of capabilities only pull and resolve matter here.
type hostFile struct {
	Server     string                `toml:"server"`
	hostConfig                       // of the server
	Hosts      map[string]hostConfig `toml:"host"`
}

type hostConfig struct {
	Capabilities []string       `toml:"capabilities"`
	CA           any            `toml:"ca"`     // a name or a list of names
	Client       any            `toml:"client"` // a name, a list of names, or of pairs of names
	SkipVerify   *bool          `toml:"skip_verify"`
	Header       map[string]any `toml:"header"` // a value or a list of values
	OverridePath bool           `toml:"override_path"`
	DialTimeout  string         `toml:"dial_timeout"`
}

// hostDirs are where the configuration of a registry may be, best first, as containerd looks
// for it: host_port_, as colons have no place in some file names, host:port, _default.
// A host whose name would lead elsewhere has _default alone.
func hostDirs(root, host string) []string {
	var names []string
	if i := strings.LastIndexByte(host, ':'); i > 0 {
		names = append(names, host[:i]+"_"+host[i+1:]+"_")
	}
	names = append(names, host, "_default")
	names = slices.DeleteFunc(names, func(name string) bool { return filepath.Base(name) != name || !filepath.IsLocal(name) || name == "." })
	for i := range names {
		names[i] = filepath.Join(root, names[i])
	}
	return names
}

// hostDir returns the directory that counts for host, "" when there is none.
func hostDir(root, host string) (string, error) {
	for _, dir := range hostDirs(root, host) {
		st, err := os.Stat(dir)
		if err == nil && st.IsDir() {
			return dir, nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("look for the configuration of registry %s: %w", host, err)
		}
	}
	return "", nil
}

// A hostPlace is what a hostConfig says, with names of files resolved.
type hostPlace struct {
	scheme, host, prefix string
	http                 backend.HTTPOptions // changes to the store's
	header               http.Header
	pull, resolve        bool
}

// readHosts reads the hosts.toml in dir: the registry itself, whose host is "" when the file
// does not say, and the mirrors in their order. Without the file, the certificates in
// dir are the registry's, as docker has them.
func readHosts(dir string) (server hostPlace, mirrors []hostPlace, err error) {
	name := filepath.Join(dir, "hosts.toml")
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		server, err = dockerCerts(dir)
		return server, nil, err
	}
	if err != nil {
		return server, nil, err
	}
	defer f.Close()
	p, err := io.ReadAll(io.LimitReader(f, maxHostsFile+1))
	if err == nil && len(p) > maxHostsFile {
		err = fmt.Errorf("it is larger than %d bytes", maxHostsFile)
	}
	if err == nil {
		server, mirrors, err = parseHosts(p, dir)
	}
	if err != nil {
		return server, nil, fmt.Errorf("read %s: %w", name, err)
	}
	return server, mirrors, nil
}

func parseHosts(p []byte, dir string) (server hostPlace, mirrors []hostPlace, err error) {
	var file hostFile
	d := toml.NewDecoder(strings.NewReader(string(p))).DisallowUnknownFields()
	if err := d.Decode(&file); err != nil {
		return server, nil, tomlError(err)
	}
	if server, err = file.place(file.Server, dir); err != nil {
		return server, nil, fmt.Errorf("server: %w", err)
	}
	for _, name := range hostOrder(p, file.Hosts) {
		m, err := file.Hosts[name].place(name, dir)
		if err == nil && m.host == "" {
			err = errors.New("no host")
		}
		if err != nil {
			return server, nil, fmt.Errorf("host %q: %w", backend.RedactURL(name), err)
		}
		mirrors = append(mirrors, m)
	}
	return server, mirrors, nil
}

// tomlError says where, and nothing of the text, which may hold a header with a login.
func tomlError(err error) error {
	if strict, ok := errors.AsType[*toml.StrictMissingError](err); ok {
		var errs []error
		for _, e := range strict.Errors {
			row, _ := e.Position()
			errs = append(errs, fmt.Errorf("line %d: unknown key %s", row, strings.Join(e.Key(), ".")))
		}
		return errors.Join(errs...)
	}
	if e, ok := errors.AsType[*toml.DecodeError](err); ok {
		row, column := e.Position()
		return fmt.Errorf("line %d, column %d: %s", row, column, strings.Join(e.Key(), "."))
	}
	return errors.New("it is no TOML of the right form")
}

// hostOrder returns the names of hosts as they come in p; the order is that of preference.
func hostOrder(p []byte, hosts map[string]hostConfig) []string {
	var order []string
	var parser unstable.Parser
	parser.Reset(p)
	for parser.NextExpression() {
		var keys []string
		for it := parser.Expression().Key(); it.Next(); {
			keys = append(keys, string(it.Node().Data))
		}
		if len(keys) < 2 || keys[0] != "host" || slices.Contains(order, keys[1]) {
			continue
		}
		if _, there := hosts[keys[1]]; there {
			order = append(order, keys[1])
		}
	}
	var others []string
	for name := range hosts {
		if !slices.Contains(order, name) {
			others = append(others, name) // written as inline tables
		}
	}
	slices.Sort(others)
	return append(order, others...)
}

// place resolves c for the address at.
func (c hostConfig) place(at, dir string) (p hostPlace, err error) {
	if p.scheme, p.host, p.prefix, err = splitHost(at, c.OverridePath); err != nil {
		return p, err
	}
	p.pull = len(c.Capabilities) == 0 || slices.Contains(c.Capabilities, "pull")
	p.resolve = len(c.Capabilities) == 0 || slices.Contains(c.Capabilities, "resolve")
	for _, capability := range c.Capabilities {
		if !slices.Contains([]string{"pull", "resolve", "push"}, capability) {
			return p, fmt.Errorf("unknown capability %q", capability)
		}
	}
	file := func(name string) string {
		if filepath.IsAbs(name) {
			return name
		}
		return filepath.Join(dir, name)
	}
	cas, err := texts(c.CA)
	if err != nil {
		return p, fmt.Errorf("ca: %w", err)
	}
	for _, name := range cas {
		p.http.CAFiles = append(p.http.CAFiles, file(name))
	}
	if p.http.ClientCert, p.http.ClientKey, err = clientPair(c.Client); err != nil {
		return p, fmt.Errorf("client: %w", err)
	}
	if p.http.ClientCert != "" {
		p.http.ClientCert, p.http.ClientKey = file(p.http.ClientCert), file(p.http.ClientKey)
	}
	p.http.SkipVerify = c.SkipVerify != nil && *c.SkipVerify
	if c.DialTimeout != "" {
		if p.http.ConnectTimeout, err = time.ParseDuration(c.DialTimeout); err != nil {
			return p, fmt.Errorf("dial_timeout: %w", err)
		}
	}
	p.header = make(http.Header)
	for name, v := range c.Header {
		if p.header[http.CanonicalHeaderKey(name)], err = texts(v); err != nil {
			return p, fmt.Errorf("header %s: %w", name, err)
		}
	}
	return p, nil
}

// splitHost takes an address apart; without a scheme it is https.
func splitHost(at string, override bool) (scheme, host, prefix string, err error) {
	if at == "" {
		return "", "", "/v2", nil
	}
	if !strings.Contains(at, "://") {
		at = "https://" + at
	}
	u, err := url.Parse(at)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" || u.User != nil || u.RawQuery != "" {
		return "", "", "", errors.New("not of the form https://host:port/path")
	}
	prefix = strings.TrimSuffix(path.Clean("/"+u.Path), "/")
	if !override && !strings.HasSuffix(prefix, "/v2") {
		prefix += "/v2"
	}
	return u.Scheme, u.Host, prefix, nil
}

// texts reads a string or a list of strings.
func texts(v any) ([]string, error) {
	switch v := v.(type) {
	case nil:
		return nil, nil
	case string:
		return []string{v}, nil
	case []any:
		var list []string
		for _, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil, errors.New("neither a string nor a list of strings")
			}
			list = append(list, s)
		}
		return list, nil
	}
	return nil, errors.New("neither a string nor a list of strings")
}

// clientPair reads a client certificate: one file with both parts, or a pair in a list.
func clientPair(v any) (cert, key string, err error) {
	list, ok := v.([]any)
	if ok && len(list) == 1 {
		v = list[0]
	} else if ok && len(list) > 1 {
		return "", "", errors.New("more than one client certificate")
	}
	names, err := texts(v)
	switch {
	case err != nil || len(names) > 2:
		return "", "", errors.New("neither a file nor a list with a pair of files")
	case len(names) == 0:
		return "", "", nil
	}
	return names[0], names[len(names)-1], nil
}

// dockerCerts reads a directory as docker's certs.d has them: authorities in *.crt, a client
// certificate in x.cert and x.key.
func dockerCerts(dir string) (hostPlace, error) {
	p := hostPlace{prefix: "/v2", pull: true, resolve: true}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return p, err
	}
	for _, e := range entries {
		name := filepath.Join(dir, e.Name())
		switch filepath.Ext(name) {
		case ".crt":
			p.http.CAFiles = append(p.http.CAFiles, name)
		case ".cert":
			p.http.ClientCert, p.http.ClientKey = name, strings.TrimSuffix(name, ".cert")+".key"
		}
	}
	return p, nil
}
